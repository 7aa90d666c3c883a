"""The controller `optuna`: samplers of Optuna over the parameters of a space."""
