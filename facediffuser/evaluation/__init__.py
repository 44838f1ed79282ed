"""Tables and checks of images that are there: IP and PC by method, other systems' images, copies, the paper's claim."""
