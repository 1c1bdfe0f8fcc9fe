"""What the LoRA paper compares with: full fine-tuning, BitFit, parts of the model, adapter layers, prefix tuning."""
