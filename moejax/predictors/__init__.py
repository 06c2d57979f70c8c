"""Predicting the experts of the next MoE layer: features, predictors, fitting, evaluation."""
