"""The version of the package, alone in its file so that the build can read it without importing torch."""

__version__ = "0.1.0"
PICTURES_VERSION = 4  # part of every job's identity; goes up by one when a job makes other pictures or measures
