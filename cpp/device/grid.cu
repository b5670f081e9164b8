// grid.cpp, compiled as CUDA.
#include "device/grid.cpp"
