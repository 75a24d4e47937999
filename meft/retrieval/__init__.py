"""How the rows of the picked neurons reach the device where the model computes, and the FFN over them."""
