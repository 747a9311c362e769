"""Many arms on one backbone: declared (config), made equal (matching), run (queue), collected (results), compared
(contrasts) and shown (tables, plots)."""
