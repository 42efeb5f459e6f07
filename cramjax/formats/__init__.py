"""Other people's weights and configurations, one file a family, read and written from tables."""
