"""What the benchmarks share: options within their ranges, and errors in one line."""

import argparse
import sys

from vision_course.core import CourseError, fast_bfloat16


def at_least(lowest):
    """A whole number that is not too small, for argparse."""
    def whole(text):
        number = int(text)
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be {lowest} or more, not {number}")
        return number

    return whole


def training_precision(device):
    """What the course trains in on this device; said, where it is not the fast one."""
    if fast_bfloat16(device):
        return "bfloat16"
    print("This machine has no fast bfloat16: the course's recipe runs in float32.")
    return "float32"


def run(main):
    """Run a benchmark; what the course refuses ends it with one line and no traceback."""
    try:
        sys.exit(main())
    except CourseError as error:
        sys.exit(f"error: {error}")
