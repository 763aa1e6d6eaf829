"""From prompts to replies: cache, search, and what a reply may be. Loads no TRL, no datasets."""
