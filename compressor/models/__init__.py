"""Models a run starts from: dense baselines, teachers, and the hub."""
