// What comes through the socket of the page server: the input, then the end of the connection.
#include <thread>

#include "criu/page_server.h"
#include "os/socket.h"
#include "target.h"

namespace unmoor {
namespace {

// Holds the server to what it promises its sink.
class CheckingSink : public criu::PageSink {
 public:
  Result<> Open(criu::PageStreamId) override { return {}; }
  Result<> Pages(criu::PageStreamId, Vaddr at, uint32_t, std::span<const std::byte> data) override {
    UNMOOR_CHECK(!data.empty() && data.size() % kPageSize == 0);
    UNMOOR_CHECK(at.value % kPageSize == 0 && data.size() <= criu::PageServer::kChunk.value);
    return {};
  }
  Result<> Absent(criu::PageStreamId, VaddrRange range, uint32_t) override {
    UNMOOR_CHECK(range.begin < range.end);
    return {};
  }
  Result<> Close() override { return {}; }
};

}  // namespace
}  // namespace unmoor

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace unmoor;
  StreamPair pair = StreamPair::Create().value();
  // Small inputs fit into the socket's buffer, larger ones are the business of a thread.
  const auto bytes = std::as_bytes(std::span(data, size));
  const auto send = [&] {
    (void)SendAll(pair.theirs.get(), bytes, "the server");
    ShutdownWrite(pair.theirs.get());
  };
  CheckingSink sink;
  criu::PageServer server(std::move(pair.ours), sink);
  constexpr size_t kFits = size_t{64} << 10;
  std::thread sender;
  if (size <= kFits) {
    send();
  } else {
    sender = std::thread(send);
  }
  (void)server.Run();
  if (sender.joinable()) sender.join();
  return 0;
}
