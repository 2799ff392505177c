// The end of what is compiled for one instruction set: see begin_*.inl.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
