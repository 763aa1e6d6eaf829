"""Who answers: a model loaded here, a server, an encoder. Loads no TRL, no datasets."""
