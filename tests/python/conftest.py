"""For all tests of this folder."""

import signal

# Where the runner was started in the background, SIGINT is ignored in it and in all processes that
# it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
