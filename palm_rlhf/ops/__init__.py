"""Floor 0: functions of tensors. They know nothing of models."""
