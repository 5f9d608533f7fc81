"""A trained model in use: loaded, sampled from, continued."""
