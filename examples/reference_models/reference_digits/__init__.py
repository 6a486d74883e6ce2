"""Small reference diffusion models trained on scikit-learn's handwritten digits."""
