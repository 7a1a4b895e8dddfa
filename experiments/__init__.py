"""One file a verb: absl flags -> objects -> the library; what several verbs share stands in rooms."""
