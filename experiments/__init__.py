"""One file a verb: absl flags -> objects -> the library."""
