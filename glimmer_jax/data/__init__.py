"""seqio tasks, feature converters, input pipeline, evaluation: all code that needs TensorFlow."""
