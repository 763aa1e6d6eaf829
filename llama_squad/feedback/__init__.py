"""What people say about a model's answers: kept line by line, queued, exported, trained on."""
