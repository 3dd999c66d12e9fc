"""Search: layers evolved from random graphs, judged by training small networks with them."""
