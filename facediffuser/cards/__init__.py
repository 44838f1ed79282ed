"""What people look at: the cards of generated datasets and of prepared photographs."""
