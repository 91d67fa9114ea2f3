//! Every kernel through its real launcher, against f64 references, on the emulated driver under every schedule (or on a
//! GPU: `AZR_TEST_DEVICE=gpu`), and planted faults that these tests must find.

mod attention;
mod emulator;
mod gemm;
mod harness;
mod head;
mod numerics;
mod optim;
mod prebuilt;
mod rope;
mod rows;
mod seats;
mod tensor;
