"""Settings of all tests."""

import hypothesis

# On a machine that others use an example may take any time.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
