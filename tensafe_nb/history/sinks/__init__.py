"""Where metrics go besides the history: TensorBoard, trackio, MLflow, Weights & Biases, or an object of the user's."""
