"""What a run will cost, told from its params alone, before anything is fetched or computed."""
