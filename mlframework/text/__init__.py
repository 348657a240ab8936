"""What text needs beyond other domains: generating it, judging what was generated, and n-grams to judge models by."""
