"""What each model is trained on: a batch goes in, a loss comes out."""
