"""What a SageMaker training job hands to its container, and what it expects back; nothing here calls AWS."""
