"""TD-MoE: one Tucker decomposition for the gates, one for the ups, one for the downs of a layer's experts."""
