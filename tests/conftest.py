"""Settings that every test shares."""

from hypothesis import settings

# No deadline: the time of one example depends on the machine. Derandomized: a failure in CI is
# found again by everybody who runs the same commit.
settings.register_profile("llama_np", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("llama_np")
