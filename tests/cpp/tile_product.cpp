#include "tile_product.h"

#include "accelrt/tiles.h"

namespace accelrt::ACCELRT_ISA {

void multiply_once(tiles::Tile& sum, const tiles::Tile& left, const tiles::Tile& right) {
  Tiles registers;
  registers.load<2>(&sum, kTileBytes);
  registers.load<5>(&left, kTileBytes);
  registers.load<7>(&right, kTileBytes);
  registers.multiply_add<2, 5, 7>();
  registers.store<2>(&sum, kTileBytes);
}

}  // namespace accelrt::ACCELRT_ISA
