{{/* The settings of a role, as YAML. (list root role) */}}
{{- define "superbatch.config" -}}
{{- $root := first . -}}
{{- $role := last . -}}
{{- $v := $root.Values -}}
{{- $worker := dict "device" $v.worker.device -}}
{{- if and $v.worker.diskCache.enabled (or (eq $role "worker") $v.coordinator.embeddedWorker) -}}
{{- $worker = dict "device" $v.worker.device "disk_cache_dir" "/var/cache/superbatch" "disk_cache_bytes" (int64 $v.worker.diskCache.bytes) -}}
{{- end -}}
{{- $config := dict
  "state" (ternary "/var/lib/superbatch/state" $v.state.uri $v.state.persistence.enabled)
  "storage" (dict "allow_uris" $v.storage.allowUris "options" $v.storage.options)
  "log" (dict "format" "json")
  "worker" $worker
  "health_listen" "0.0.0.0:50053"
  "allow_insecure" (not (and $v.tls.enabled $v.auth.enabled)) -}}
{{- $coordinator := dict "grace_seconds" (get $v $role).graceSeconds -}}
{{- $metrics := ternary "0.0.0.0:9464" nil $v.metrics.enabled -}}
{{- if eq $role "coordinator" -}}
{{- $coordinator = mergeOverwrite $coordinator (dict "advertise_address" (include "superbatch.coordinatorUri" $root) "workers_embedded" $v.coordinator.embeddedWorker) -}}
{{- $config = mergeOverwrite $config (dict "listen" "0.0.0.0:50051") -}}
{{- $_ := set $config "metrics_listen" $metrics -}}
{{- if $v.coordinator.audit.enabled -}}
{{- $_ := set $config "audit" (dict "file" (ternary "/var/log/superbatch/audit.jsonl" "/dev/stdout" (not (empty $v.coordinator.audit.volume)))) -}}
{{- end -}}
{{- else -}}
{{- $role := dict "coordinator" (include "superbatch.coordinatorUri" $root) "listen" "0.0.0.0:50052" -}}
{{- $_ := set $role "metrics_listen" $metrics -}}
{{- $config = mergeOverwrite $config (dict "worker_role" $role) -}}
{{- end -}}
{{- $config = mergeOverwrite $config (dict "coordinator" $coordinator) -}}
{{- include "superbatch.secure" (list $root $role $config) -}}
{{- mergeOverwrite $config (deepCopy $v.config) (deepCopy (get $v $role).config) | toYaml -}}
{{- end -}}

{{/* Adds what TLS and tokens need. (list root role config) */}}
{{- define "superbatch.secure" -}}
{{- $v := (first .).Values -}}
{{- $role := index . 1 -}}
{{- $config := last . -}}
{{- if $v.tls.enabled -}}
{{- $folder := "/etc/superbatch/tls" -}}
{{- $tls := dict
  "cert" (printf "%s/tls.crt" $folder) "key" (printf "%s/tls.key" $folder) "ca" (printf "%s/ca.crt" $folder)
  "worker_name" (include "superbatch.workerTlsName" (first .)) -}}
{{- /* Workers are called by the coordinator alone, which shows its certificate; one of somebody else's may not be made for that. Trainers that
       fetch rows have none: then tickets and the coordinator's secret, which the server checks in any case, are what a call needs. */ -}}
{{- $byCoordinator := and (eq $role "worker") (ne $v.tls.source "secret") (not $v.worker.direct.enabled) -}}
{{- if or $v.tls.requireClientCertificates $byCoordinator -}}
{{- $_ := set $tls "client_ca" (printf "%s/ca.crt" $folder) -}}
{{- end -}}
{{- $_ := set $config "tls" $tls -}}
{{- end -}}
{{- if $v.auth.enabled -}}
{{- if eq $role "coordinator" -}}
{{- $_ := set $config "auth" (dict "tokens_file" "/etc/superbatch/tokens/tokens" "metrics" $v.auth.metrics.enabled) -}}
{{- else -}}
{{- $_ := set $config.worker_role "token_file" "/etc/superbatch/tokens/worker" -}}
{{- end -}}
{{- end -}}
{{- end -}}
