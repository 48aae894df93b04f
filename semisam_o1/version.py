"""The version of the package; this is its only definition."""

VERSION = "0.1.0"
