"""The miniature world: a renderer of people and ready-trained small parts, so that the whole method runs on two CPU cores."""
