"""The one trainer that all experiments share."""
