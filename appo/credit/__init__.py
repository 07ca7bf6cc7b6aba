"""Credit: how well the gradient of each way of weighting tokens points, measured on a model (docs/credit.md)."""
