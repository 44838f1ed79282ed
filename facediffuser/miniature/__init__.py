"""The miniature world: a renderer of people and ready-trained small parts; the whole method on two CPU cores."""
