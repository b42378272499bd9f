#pragma once

namespace kantor {

// Devices the driver offers; 0 without a driver or a device.
int cuda_device_count();
// CUDA runtime this build links, e.g. 13000; 0 without CUDA code.
int cuda_runtime_version();

}  // namespace kantor
