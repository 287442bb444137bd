"""What a rank holds of a parameter, its gradient and its optimizer state, under a training strategy."""
