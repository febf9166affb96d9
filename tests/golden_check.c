/* LLaMA in C checks itself against a golden file: no Python, no library.
 *
 *     cc -O2 -o golden_check golden_check.c -lm
 *     ./golden_check model.safetensors golden.safetensors [mistake]
 *
 * It reads float32 weights and the golden file (both safetensors: 8 bytes length, a JSON header,
 * raw numbers), runs the prompt and the decode steps with plain loops and a key/value cache, and
 * compares the embedding, every layer's output, the final norm and the logits:
 * ||mine - gold|| / ||gold|| <= 2 * yardstick. Exit code 0 when everything passes.
 *
 * Not for every model: float32, SiLU, no rope scaling, no biases, one text. `mistake` plants an
 * error: "eps" (rms_norm_eps a hundred times larger), "theta" (a rotary base of 500),
 * "tile" (query head n reads key/value head n mod K).
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char *header;
  unsigned char *data;
} File;

static void die(const char *what, const char *name) {
  fprintf(stderr, "golden_check: %s: %s\n", what, name);
  exit(2);
}

static File read_file(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) die("cannot open", path);
  fseek(f, 0, SEEK_END);
  long size = ftell(f);
  rewind(f);
  unsigned char *all = malloc(size + 1);
  if (size < 8 || fread(all, 1, size, f) != (size_t)size) die("cannot read", path);
  fclose(f);
  uint64_t length = 0;
  for (int i = 7; i >= 0; i--) length = length << 8 | all[i];
  if (length > (uint64_t)size - 8) die("not a safetensors file", path);
  File file = {malloc(length + 1), all + 8 + length};
  memcpy(file.header, all + 8, length);
  file.header[length] = 0;
  return file;
}

/* The raw numbers of a tensor, or NULL: its entry in the header is "name":{...}. */
static void *find(File file, const char *name) {
  char key[512];
  snprintf(key, sizeof key, "\"%s\":{", name);
  char *entry = strstr(file.header, key);
  if (!entry) return NULL;
  char *offsets = strstr(entry, "\"data_offsets\":[");
  return offsets ? file.data + atoll(offsets + 16) : NULL;
}

static void *need(File file, const char *name) {
  void *data = find(file, name);
  if (!data) die("missing tensor", name);
  return data;
}

/* A string of the golden file's metadata: "key":"value". */
static const char *text(File file, const char *name) {
  char key[512];
  snprintf(key, sizeof key, "\"%s\":\"", name);
  char *found = strstr(file.header, key);
  if (!found) die("missing metadata", name);
  return found + strlen(key);
}

/* A number of the configuration, which is JSON within a JSON string: \"name\": value. */
static double setting(File golden, const char *name) {
  char key[512];
  snprintf(key, sizeof key, "\\\"%s\\\": ", name);
  const char *found = strstr(text(golden, "config"), key);
  if (!found) die("missing setting", name);
  return atof(found + strlen(key));
}

static int D, F, V, L, N, K, H, T, prompt;
static double eps, theta;
static int tile;

static float *layer_weight(File model, int layer, const char *name) {
  char full[256];
  snprintf(full, sizeof full, "model.layers.%d.%s.weight", layer, name);
  return need(model, full);
}

static void times(float *out, const float *w, const float *x, int rows, int columns) {
  for (int i = 0; i < rows; i++) {
    float sum = 0;
    for (int j = 0; j < columns; j++) sum += w[(long)i * columns + j] * x[j];
    out[i] = sum;
  }
}

static void rms_norm(float *out, const float *x, const float *w) {
  float squares = 0;
  for (int i = 0; i < D; i++) squares += x[i] * x[i];
  float scale = 1 / sqrtf(squares / D + (float)eps);
  for (int i = 0; i < D; i++) out[i] = x[i] * scale * w[i];
}

/* Channel j of every head turns with channel j + H/2. */
static void rotate(float *x, int heads, int position) {
  for (int h = 0; h < heads; h++)
    for (int j = 0; j < H / 2; j++) {
      double angle = position * pow(theta, -2.0 * j / H);
      float c = cos(angle), s = sin(angle), *a = x + h * H + j, *b = a + H / 2, old = *a;
      *a = old * c - *b * s;
      *b = *b * c + old * s;
    }
}

static void attend(float *out, const float *q, const float *keys, const float *values, int t) {
  float *weights = malloc((t + 1) * sizeof(float));
  for (int n = 0; n < N; n++) {
    int k = tile ? n % K : n / (N / K);
    float most = -INFINITY, sum = 0;
    for (int s = 0; s <= t; s++) {
      float dot = 0;
      for (int j = 0; j < H; j++) dot += q[n * H + j] * keys[(s * K + k) * H + j];
      weights[s] = dot / sqrtf(H);
      if (weights[s] > most) most = weights[s];
    }
    for (int s = 0; s <= t; s++) sum += weights[s] = expf(weights[s] - most);
    for (int j = 0; j < H; j++) {
      float mixed = 0;
      for (int s = 0; s <= t; s++) mixed += weights[s] / sum * values[(s * K + k) * H + j];
      out[n * H + j] = mixed;
    }
  }
  free(weights);
}

/* Compare (T, width) numbers with the golden tensor; returns 1 when they fail. */
static int check(File golden, const char *name, const float *mine, int width) {
  const float *gold = find(golden, name);
  if (!gold) return 0; /* not recorded */
  char key[256];
  snprintf(key, sizeof key, "yardstick/%s", name);
  double yardstick = atof(text(golden, key)); /* the first of three: float32 */
  if (yardstick < 6e-8) yardstick = 6e-8;
  double off = 0, size = 0;
  for (long i = 0; i < (long)T * width; i++) {
    double difference = (double)mine[i] - gold[i];
    off += difference * difference;
    size += (double)gold[i] * gold[i];
  }
  double error = sqrt(off / size);
  const char *verdict = error <= 2 * yardstick ? "pass" : error <= 4 * yardstick ? "note" : "fail";
  printf("%-24s error %.2e yardstick %.2e %s\n", name, error, yardstick, verdict);
  return !(error <= 4 * yardstick); /* NaN fails */
}

int main(int count, char **arguments) {
  if (count < 3) die("usage", "golden_check MODEL GOLDEN [eps|theta|tile]");
  File model = read_file(arguments[1]), golden = read_file(arguments[2]);
  const char *mistake = count > 3 ? arguments[3] : "";
  D = setting(golden, "hidden_size");
  F = setting(golden, "intermediate_size");
  V = setting(golden, "vocab_size");
  L = setting(golden, "num_hidden_layers");
  N = setting(golden, "num_attention_heads");
  K = setting(golden, "num_key_value_heads");
  H = setting(golden, "head_dim");
  eps = setting(golden, "rms_norm_eps") * (strcmp(mistake, "eps") ? 1 : 100);
  theta = strcmp(mistake, "theta") ? setting(golden, "rope_theta") : 500;
  tile = !strcmp(mistake, "tile");
  prompt = atoi(text(golden, "prompt_length"));
  T = prompt + atoi(text(golden, "decode_steps"));
  int64_t *ids = need(golden, "input_ids");

  float *stream = malloc((long)(L + 1) * T * D * sizeof(float));
  float *keys = malloc((long)L * T * K * H * sizeof(float));
  float *values = malloc((long)L * T * K * H * sizeof(float));
  float *final = malloc((long)T * D * sizeof(float));
  float *logits = malloc((long)T * V * sizeof(float));
  float *normed = malloc(D * sizeof(float)), *added = malloc(D * sizeof(float));
  float *q = malloc(N * H * sizeof(float)), *context = malloc(N * H * sizeof(float));
  float *gate = malloc(F * sizeof(float)), *up = malloc(F * sizeof(float));
  float *embedding = need(model, "model.embed_tokens.weight");
  float *head = find(model, "lm_head.weight");
  if (!head) head = embedding; /* tied */

  for (int t = 0; t < T; t++) {
    memcpy(stream + (long)t * D, embedding + ids[t] * D, D * sizeof(float));
    for (int l = 0; l < L; l++) {
      float *x = stream + ((long)(l + 1) * T + t) * D;
      memcpy(x, stream + ((long)l * T + t) * D, D * sizeof(float));
      float *layer_keys = keys + (long)l * T * K * H, *layer_values = values + (long)l * T * K * H;
      float *k = layer_keys + t * K * H;
      rms_norm(normed, x, layer_weight(model, l, "input_layernorm"));
      times(q, layer_weight(model, l, "self_attn.q_proj"), normed, N * H, D);
      times(k, layer_weight(model, l, "self_attn.k_proj"), normed, K * H, D);
      times(layer_values + t * K * H, layer_weight(model, l, "self_attn.v_proj"), normed, K * H, D);
      rotate(q, N, t);
      rotate(k, K, t);
      attend(context, q, layer_keys, layer_values, t);
      times(added, layer_weight(model, l, "self_attn.o_proj"), context, D, N * H);
      for (int i = 0; i < D; i++) x[i] += added[i];
      rms_norm(normed, x, layer_weight(model, l, "post_attention_layernorm"));
      times(gate, layer_weight(model, l, "mlp.gate_proj"), normed, F, D);
      times(up, layer_weight(model, l, "mlp.up_proj"), normed, F, D);
      for (int i = 0; i < F; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
      times(added, layer_weight(model, l, "mlp.down_proj"), gate, D, F);
      for (int i = 0; i < D; i++) x[i] += added[i];
    }
    rms_norm(final + (long)t * D, stream + ((long)L * T + t) * D, need(model, "model.norm.weight"));
    times(logits + (long)t * V, head, final + (long)t * D, V, D);
  }

  int failures = check(golden, "model.embed_tokens", stream, D);
  for (int l = 0; l < L; l++) {
    char name[64];
    snprintf(name, sizeof name, "model.layers.%d", l);
    failures += check(golden, name, stream + (long)(l + 1) * T * D, D);
  }
  failures += check(golden, "model.norm", final, D);
  failures += check(golden, "lm_head", logits, V);
  puts(failures ? "FAIL" : "PASS");
  return failures != 0;
}
