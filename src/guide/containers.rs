//! Containers and Kubernetes: which network namespace, which capabilities, what a pod needs.
//!
//! A queue belongs to a network namespace, and so do rules. Three places are possible:
//!
//! | the filter runs | it sees | it needs |
//! |---|---|---|
//! | in the container, or beside it in the pod | the traffic of the container: `Output`, `Input` | `CAP_NET_ADMIN` in the container |
//! | on the host, in the host's namespace (`--network host`, `hostNetwork: true`) | what the host forwards for its containers: `Forward` | `CAP_NET_ADMIN` in the initial user namespace |
//! | on the host, with the queue in the container's namespace | as in the container, which cannot change it | `CAP_SYS_ADMIN` as well |
//!
//! The third, as a program:
//!
//! ```no_run
#![doc = include_str!("programs/containers.rs")]
//! ```
//!
//! # A pod
//!
//! All containers of a pod share its network namespace. A sidecar filters all of them:
//!
//! ```yaml
//! spec:
//!   initContainers:
//!     - name: filter
//!       image: example.org/my-filter:1
//!       restartPolicy: Always          # a sidecar: it starts before the others, and stays
//!       securityContext:
//!         runAsUser: 0                 # or a file capability in the image
//!         allowPrivilegeEscalation: false
//!         capabilities: {drop: [ALL], add: [NET_ADMIN]}   # NET_RAW as well for an Injector
//!       startupProbe:                  # the next containers wait for it
//!         exec:
//!           command: [grep, -q, "^ *0 ", /proc/net/netfilter/nfnetlink_queue]
//!       resources: {limits: {memory: 28Mi}}   # for copy_range 1500: guide::service
//!   containers:
//!     - name: service
//!       image: example.org/service:1   # without NET_ADMIN: it could remove the filter
//! ```
//!
//! With Docker: `docker run --cap-add NET_ADMIN`, and `--network container:NAME` to filter another
//! one. On a node, for all pods: a DaemonSet with `hostNetwork: true` and the same capability, and
//! rules at `Forward`.
//!
//! # What surprises
//!
//! - **Process 1 ignores SIGTERM** unless it handles it. A program that awaits only Ctrl-C is
//!   killed after the grace period (10 s, in Kubernetes 30 s), and its queued packets are dropped:
//!   [the stop](super::service#the-stop).
//! - **A user without `NET_ADMIN` in its effective set.** `runAsUser: 1000` with
//!   `add: [NET_ADMIN]` puts the capability into the bounding set only. Run as root of the
//!   container, or set it on the file in the image: `setcap cap_net_admin+ep`; that needs
//!   `allowPrivilegeEscalation: true`, because `no_new_privs` disables file capabilities.
//! - **User namespaces** (`hostUsers: false`, rootless Docker and Podman): all works in the
//!   container's own network, and `CAP_NET_ADMIN` there is worth nothing on the host. Since Linux
//!   7.1 no payload is replaced ([`kernels`](super::kernels)). Before 6.18, with the
//!   usual `net.core.wmem_max`, rules that stay (`fail_closed`) drop everything at their hooks for
//!   some 100 ms when the next process replaces them. Root cannot read the kernel's counters if the
//!   network namespace was made before the map of users.
//! - **Modules are the node's.** If `bind` or the rules return `Unsupported`, load them on the
//!   node: `nfnetlink_queue`, `nft_queue` or `xt_NFQUEUE`, `nf_tables`. A container cannot.
//! - **Not every network passes the hooks of the host.** Container networks on eBPF, macvlan,
//!   IPVLAN and SR-IOV need not pass the host's `Forward`:
//!   [`trouble`](super::trouble#my-rule-sees-nothing). In the pod the hooks work. Sandboxes with a
//!   kernel of their own (gVisor) have no NFQUEUE; in virtual machines (Kata) it is the guest's
//!   kernel.
//! - **Service addresses** are translated. A pod's `Output` sees the address of the service before
//!   the node translates it, the node's `Forward` that of a pod:
//!   [`rewriting`](super::rewriting#with-address-translation). A network plugin that translates in
//!   `connect` shows the pod's address at both.
//! - **Others rebuild their tables.** kube-proxy, network plugins and firewalld delete chains and
//!   make them anew; if that unregisters a hook, the kernel drops what is queued in that network
//!   namespace: [`packets_gone_total`](super::metrics). In the pod's namespace this happens least.
//! - **Probes and meshes are traffic**, too: exclude the ports of the kubelet's probes, or they
//!   fail while the filter is slow, and the pod is restarted.
//! - **The first packets.** Before the sidecar has bound its queue, nothing filters. The order of
//!   `initContainers` covers the containers behind it, not what arrives for the pod's address.
