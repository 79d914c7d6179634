"""One run: loop, schedules, checkpoint, report. Knows interfaces, not compression."""
