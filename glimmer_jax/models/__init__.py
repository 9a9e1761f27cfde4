"""T5, the FiD / LUMEN / GLIMMER family built from it, and the T5X-style model class."""
