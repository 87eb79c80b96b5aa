"""Python's clock set forward or back, in every Python process that finds a module.

Ray itself does not start under a preloaded clock (libfaketime); its own programs keep that of the machine.
"""

# `logging` has one of these functions as an attribute of a class, so they must not be functions of Python: those would
# be its methods.
_MODULE = """
import time
from functools import partial

def shifted(clock, by):
    return clock() + by

def converted(convert, seconds=None):
    return convert(time.time() if seconds is None else seconds)

def written(write, format, moment=None):
    return write(format, time.localtime() if moment is None else moment)

time.time = partial(shifted, time.time, {seconds})
time.time_ns = partial(shifted, time.time_ns, {seconds} * 10**9)
time.gmtime, time.localtime = partial(converted, time.gmtime), partial(converted, time.localtime)
time.strftime = partial(written, time.strftime)
"""


def sitecustomize(seconds: int) -> str:
    """The text of a `sitecustomize.py` that sets `time` forward by so many seconds, or back by a negative number."""
    return _MODULE.format(seconds=seconds)
