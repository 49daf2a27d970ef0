"""What the benchmarks share: options within their ranges, and errors in one line."""

import argparse
import sys

from vision_course.core import CourseError


def at_least(lowest):
    """A whole number that is not too small, for argparse."""
    def whole(text):
        number = int(text)
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be {lowest} or more, not {number}")
        return number

    return whole


def run(main):
    """Run a benchmark; what the course refuses ends it with one line and no traceback."""
    try:
        sys.exit(main())
    except CourseError as error:
        sys.exit(f"error: {error}")
