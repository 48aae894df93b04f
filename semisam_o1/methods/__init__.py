"""Semi-supervised methods: each a loss and a handler around MONAI's `SupervisedTrainer`."""
