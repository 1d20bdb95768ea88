"""What other quantizers cost a pretrained model, each in an environment of its own."""
