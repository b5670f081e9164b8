// grid.cpp, compiled as CUDA.
#include "grid.cpp"
