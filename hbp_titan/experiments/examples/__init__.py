"""The planner in other trainers (docs/planner.md). Each file needs the trainer that it is named after."""
