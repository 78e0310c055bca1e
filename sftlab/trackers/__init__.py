"""The options of the `tracker` group: one module each, with a function of a run (`About`) that returns a Tracker."""
