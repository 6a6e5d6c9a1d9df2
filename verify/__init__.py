"""The verifier: how far the gradient of a layer is from the truth, on every input of a float format."""
